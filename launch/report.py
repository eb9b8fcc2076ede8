"""Draw a run's curve and overlays and write its report.html: python launch/report.py run=runs/sample"""

from segformer.command import importing

with importing(__name__):
    from segformer.config import cli
    from segformer.report import ReportConfig, report

if __name__ == "__main__":
    cli(ReportConfig, "report", report)
