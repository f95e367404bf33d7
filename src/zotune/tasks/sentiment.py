"""Sentiment: SST-2 and SST-5 (Socher et al. 2013)."""

from zotune.tasks.task import Hub, Task

sst2 = Task(
    name="sst2",
    source=Hub("nyu-mll/glue", "sst2", test_split="validation"),
    prompt="{sentence} It was",
    plain="{sentence}",
    words={"0": "terrible", "1": "great"},
)
sst5 = Task(
    name="sst5",
    source=Hub("SetFit/sst5"),
    prompt="{text} It was",
    plain="{text}",
    words={"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"},
)
