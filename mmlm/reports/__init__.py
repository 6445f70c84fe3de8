"""What people look at: terminal tables, progress, plots, contact sheets and one HTML page.

    training, evaluation, cli ──► reports
                                  you are here

Everything here takes plain values - numbers, texts, pictures - and draws them. It reads the
files of a run (`log.jsonl`, `growth.jsonl`, `results.json`, `predictions.jsonl`) and knows no
model, no benchmark and no scorer.
"""

from mmlm.reports.tables import markdown_table as markdown_table
from mmlm.reports.tables import plain_table as plain_table
from mmlm.reports.tables import scores_table as scores_table
from mmlm.reports.write import Written as Written
from mmlm.reports.write import write_report as write_report
