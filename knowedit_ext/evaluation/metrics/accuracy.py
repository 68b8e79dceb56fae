"""Accuracy, EA PA NA: is every token of the right target the likeliest? (zsRE's table; summarize.py:47-151)"""

from ..metric import Metric, shares

COLUMNS = {"rewrite_prompts": "EA", "paraphrase_prompts": "PA", "neighborhood_prompts": "NA"}

METRIC = Metric(tuple(COLUMNS.values()), 100, shares(COLUMNS))
