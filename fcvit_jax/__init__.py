"""fcvit_jax: Vision Transformers made cheaper at inference without training, in JAX and Flax.

import jax

import fcvit_jax as fc

rows = fc.evaluate("packaged:digits", "digits:test", ["dense", "tome_r16@nearest"])

checkpoint = fc.load_checkpoint("packaged:digits")
schedule = fc.MergeSchedule.parse("s2winc5_r8", checkpoint.config.depth)
model = fc.ViT(checkpoint.config, schedule=schedule)
logits, out = jax.jit(model.apply)({"params": checkpoint.params}, images)
"""

from fcvit_jax.checkpoint import Checkpoint as Checkpoint
from fcvit_jax.checkpoint import load_checkpoint as load_checkpoint
from fcvit_jax.checkpoint import save_checkpoint as save_checkpoint
from fcvit_jax.convert import convert as convert
from fcvit_jax.data.augment import Augment as Augment
from fcvit_jax.data.preprocess import Preprocess as Preprocess
from fcvit_jax.errors import InputError as InputError
from fcvit_jax.evaluation import evaluate as evaluate
from fcvit_jax.export import export as export
from fcvit_jax.models import flops as flops
from fcvit_jax.models import rules as rules
from fcvit_jax.models import zoo as zoo
from fcvit_jax.models.config import ViTConfig as ViTConfig
from fcvit_jax.models.merging import Matching as Matching
from fcvit_jax.models.merging import follow_patches as follow_patches
from fcvit_jax.models.merging import merge_tokens as merge_tokens
from fcvit_jax.models.merging import unmerge_tokens as unmerge_tokens
from fcvit_jax.models.patch_features import PatchFeatures as PatchFeatures
from fcvit_jax.models.patch_features import patch_features as patch_features
from fcvit_jax.models.rules import Layer as Layer
from fcvit_jax.models.rules import match_tokens as match_tokens
from fcvit_jax.models.schedule import Dense as Dense
from fcvit_jax.models.schedule import Global as Global
from fcvit_jax.models.schedule import Local as Local
from fcvit_jax.models.schedule import MergeSchedule as MergeSchedule
from fcvit_jax.models.vit import ViT as ViT
from fcvit_jax.probe import ProbeReport as ProbeReport
from fcvit_jax.probe import probe as probe
from fcvit_jax.probe import zero_shot as zero_shot
from fcvit_jax.search import SearchReport as SearchReport
from fcvit_jax.search import search as search
from fcvit_jax.training import OptimizerConfig as OptimizerConfig
from fcvit_jax.training import SAMConfig as SAMConfig
from fcvit_jax.training import TargetConfig as TargetConfig
from fcvit_jax.training import TrainConfig as TrainConfig
from fcvit_jax.training import train as train
from fcvit_jax.training.sam import sam_value_and_grad as sam_value_and_grad

__version__ = "0.1.0"
