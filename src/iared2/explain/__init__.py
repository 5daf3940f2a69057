"""Layer 5: explainers, (model, images, target) -> maps. Ours is the reduced model's own trace."""

from iared2.explain.labels import class_names as class_names
from iared2.explain.ours import Explanation as Explanation
from iared2.explain.ours import Prediction as Prediction
from iared2.explain.ours import Speed as Speed
from iared2.explain.ours import explain as explain
from iared2.explain.ours import interpreter_maps as interpreter_maps
from iared2.explain.ours import measure as measure
