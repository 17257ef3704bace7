"""What the user sees and keeps of a run: log lines, ``metrics.jsonl``, the progress bar and Weights & Biases."""

from pico_fast.monitor.errors import MonitorError
from pico_fast.monitor.metrics import MetricsError, read_metrics
from pico_fast.monitor.monitor import Monitor
from pico_fast.monitor.silent import SilentMonitor

__all__ = ["MetricsError", "Monitor", "MonitorError", "SilentMonitor", "read_metrics"]
