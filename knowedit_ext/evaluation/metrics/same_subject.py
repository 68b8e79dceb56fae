"""Same subject: other facts about the edited subject, which are to stay as they are. Not in the papers' tables."""

from ..metric import answered

METRIC = answered({"same_subject_prompts": "same subject"}, 130)
