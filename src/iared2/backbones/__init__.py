"""Layer 3: adapters that run a backbone on packed tokens. Importing this registers the built-in ones."""

from iared2.backbones import mini as mini
from iared2.backbones import timm_vit as timm_vit
from iared2.backbones.base import BackboneAdapter as BackboneAdapter
from iared2.backbones.base import adapt as adapt
from iared2.backbones.base import register_adapter as register_adapter
