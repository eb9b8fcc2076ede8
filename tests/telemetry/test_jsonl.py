"""Files of lines: what a crash or a full disk leaves of them, and what is read back."""

import json

from segformer.telemetry.jsonl import Ledger, LineFile, newest_row, read_metrics


def test_a_torn_last_line_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train"}\n{"kind": "tr')
    file = LineFile(path)
    file.write('{"kind": "eval"}')
    file.close()
    assert path.read_text().splitlines() == ['{"kind": "train"}', '{"kind": "tr', '{"kind": "eval"}']
    assert [row["kind"] for row in read_metrics(tmp_path)] == ["train", "eval"]


def test_rows_of_a_kind_are_found_behind_torn_and_other_ones(tmp_path):
    assert newest_row(tmp_path, "train") is None
    lines = [json.dumps({"kind": "train", "step": step}) for step in range(9)]
    lines += ['{"kind": "tr', json.dumps({"kind": "eval", "step": 1}), '{"kind": "train", "st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == list(range(9))
    assert (
        newest_row(tmp_path, "train", "eval") == newest_row(tmp_path, "eval") == {"kind": "eval", "step": 1}
    )
    assert newest_row(tmp_path, "final") is None


def test_lines_that_no_run_wrote_are_passed_over(tmp_path):
    rows = [json.dumps({"kind": "train", "step": step}).encode() for step in (1, 2)]
    odd = [b"5", b"null", b"[1]", b'"text"', b'{"kind": "train", "step": \xff}', b"\xff\xfe", b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*odd, rows[0], *odd, rows[1]]))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert newest_row(tmp_path, "train") == {"kind": "train", "step": 2}


def test_the_ledger_appends_the_samples_of_each_process(tmp_path):
    Ledger(tmp_path / "ledger", 3, 0).add(1, [5, 2])
    Ledger(tmp_path / "ledger", 3, 1).add(2, [7])
    lines = [json.loads(line) for line in (tmp_path / "ledger/rank-00003.jsonl").read_text().splitlines()]
    assert lines == [{"from": 0, "step": 1, "ids": [5, 2]}, {"from": 1, "step": 2, "ids": [7]}]
