"""Sentiment: SST-2 (Socher et al. 2013, as in GLUE)."""

from zotune.tasks.task import Hub, Task

sst2 = Task(
    name="sst2",
    source=Hub("nyu-mll/glue", "sst2", test_split="validation"),
    prompt="{sentence} It was",
    words={"0": "terrible", "1": "great"},
)
