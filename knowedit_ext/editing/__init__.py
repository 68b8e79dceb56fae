"""Edits as data (`Edit`), what is to be edited (`EditRequest`), and the methods that make them (`edit`, `METHODS`)."""

from .anchor import value_norm
from .edit import Edit
from .method import Method
from .methods import METHODS, edit, method_of
from .methods.alphaedit import AlphaEditParams, alphaedit
from .methods.emmet import EMMETParams, emmet
from .methods.encore import ENCOREParams, encore
from .methods.finetune import FTParams, finetune, finetune_each
from .methods.kn import kn
from .methods.memit import MEMITParams, memit
from .methods.pmet import PMETParams, pmet
from .methods.r_rome import RROMEParams, r_rome
from .methods.rome import ROMEParams, rome, rome_each
from .methods.ultraedit import UltraEditParams, ultraedit
from .neurons import KnowledgeNeurons, KNParams, knowledge_neurons
from .problems import PROBLEMS, as_problem
from .request import EditRequest
from .transforms import prune, rect

__all__ = [
    "METHODS",
    "PROBLEMS",
    "AlphaEditParams",
    "EMMETParams",
    "ENCOREParams",
    "Edit",
    "EditRequest",
    "FTParams",
    "KNParams",
    "KnowledgeNeurons",
    "MEMITParams",
    "Method",
    "PMETParams",
    "ROMEParams",
    "RROMEParams",
    "UltraEditParams",
    "alphaedit",
    "as_problem",
    "edit",
    "emmet",
    "encore",
    "finetune",
    "finetune_each",
    "kn",
    "knowledge_neurons",
    "memit",
    "method_of",
    "pmet",
    "prune",
    "r_rome",
    "rect",
    "rome",
    "rome_each",
    "ultraedit",
    "value_norm",
]
