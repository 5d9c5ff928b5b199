"""The module's page as a Space: a form that computes the metric."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("acceptance_rate.py"))))
