"""The page that shows what each version of a model costs and saves."""

from .page import (
    plot_svg as plot_svg,
    report_html as report_html,
    write_report as write_report,
)
