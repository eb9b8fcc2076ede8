"""Fetch a public data set from its official address.

    python data_prep/download.py data=ade20k output=<dir> accept_license=true

License and source are printed first, and nothing is fetched before
accept_license=true. A run that was stopped goes on where it was; a second one
does nothing. Sets behind a registration end in one line that says where to get
them and where to put them. Files and checksums: conf/download/<name>.yaml.
"""

from dataclasses import dataclass, field
from pathlib import Path

from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.download import Download, obtain
from segformer.errors import ConfigError, DataError
from segformer.training.config import cli


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where a data set comes from."""

    page: str = ""
    """Page of the set."""
    files: list[Download] = field(default_factory=list)
    """Files to download, in this order."""
    folder: str = ""
    """Folder below output that becomes the root of the set."""
    missing: str = ""
    """Files to fetch by hand from the page; empty = none."""


@dataclass(kw_only=True, slots=True)
class DownloadConfig:
    """Which data set is fetched, and to where."""

    data: DatasetConfig = field(default_factory=DatasetConfig)
    """The data set; choose a file of conf/data with data=<name>."""
    download: SourceConfig = field(default_factory=SourceConfig)
    """Its addresses; the file of conf/download of the same name."""
    output: str = ""
    """Folder for the files; empty = data.root."""
    accept_license: bool = False
    """true: you have read the license and agree to it."""
    keep_archives: bool = False
    """Leave the archives in <output>/downloads after unpacking."""


def download(cfg: DownloadConfig) -> None:
    """Print license and source, fetch and unpack every file, print how to go on."""
    name, source = cfg.data.name, cfg.download
    print(f"{name}\nlicense: {cfg.data.license}\nsource: {source.page}\ncite: {cfg.data.citation}")
    for item in source.files:
        size = f"{item.size / 1e9:.2f} GB" if item.size else "size not published"
        print(f"file: {item.url} ({size}, {item.checksum or 'no checksum published'})")
    out = cfg.output or cfg.data.root
    if source.files and not out:
        raise ConfigError("no folder to download to; give output=<folder>")
    root = Path(out or "<folder>") / source.folder
    command = f"python data_prep/shard.py data={name} root={root}"
    if not source.files:
        raise DataError(
            f"{name} cannot be fetched by a program; needed: {source.missing} ({source.page}); then {command}"
        )
    if not cfg.accept_license:
        raise ConfigError("read the license at the source; accept_license=true says that you agree to it")
    for item in source.files:
        sha256 = obtain(item, Path(out), keep=cfg.keep_archives)
        if sha256 is None:
            print(f"{item.name}: was downloaded and unpacked before")
        else:
            print(f"{item.name}: sha256 {sha256}{'' if item.checksum else ' (nothing to compare it with)'}")
    if source.missing:
        raise DataError(f"still missing in {str(root)!r}: {source.missing} ({source.page}); then {command}")
    print(f"next: {command}")


if __name__ == "__main__":
    cli(DownloadConfig, "download", download)
