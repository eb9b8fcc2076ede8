"""Draw a run's curve and overlays and write its report.html.

python launch/report.py checkpoint=runs/sample
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.report import ReportConfig, report
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(ReportConfig, "report", report)
