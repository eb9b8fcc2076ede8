"""Look at data and settings before a run.

    python launch/doctor.py experiment=sample
    python launch/doctor.py data=camvid root=<dir> ranks=8 gpu_gib=80
    python launch/doctor.py experiment=sample measure=true

Takes the settings of any training command. Exit code 0: training may start;
2: it should not (the FAIL lines say why and what to do).
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.doctor.doctor import DoctorConfig, doctor
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(DoctorConfig, "doctor", doctor)
