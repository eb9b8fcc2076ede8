"""Look at data and settings before a run, or at labels that a model doubts.

    python launch/doctor.py experiment=sample
    python launch/doctor.py data=camvid root=<dir> ranks=8 gpu_gib=80
    python launch/doctor.py experiment=sample measure=true
    python launch/doctor.py checkpoint=runs/sample
    python launch/doctor.py checkpoint=runs/sample --help

Takes the settings of any training command. Exit code 0: training may start;
2: it should not (the FAIL lines say why and what to do).
With checkpoint=<run or export> it ranks the samples by how strongly that model
disagrees with their labels, and takes other settings: see its --help.
"""

import sys

from segformer.errors import importing

with importing(__name__):
    from segformer.doctor.doctor import DoctorConfig, doctor
    from segformer.doctor.labels import LabelsConfig, rank_labels
    from segformer.training.config import cli

if __name__ == "__main__":
    if any(argument.startswith("checkpoint=") for argument in sys.argv[1:]):
        cli(LabelsConfig, "labels", rank_labels)
    else:
        cli(DoctorConfig, "doctor", doctor)
