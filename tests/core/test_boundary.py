"""Names become modules, and activations become specs."""

import pytest
import torch
from core.nets import CLASSES, Told, attached, blobs, mlp, run_step
from torch import nn

from lightning_dni.core import BoundarySpec, DNIEngine, LeafSpec
from lightning_dni.core.boundary import choose_by_pattern, resolve_boundaries
from lightning_dni.errors import BoundaryError


@pytest.mark.parametrize("patterns", [["0", "1"], ["1", "0"], ["[01]"], ["1", "[01]", "0"]])
def test_order_and_pattern_do_not_matter(patterns):
    model = mlp()
    assert resolve_boundaries(model, patterns) == {"0": model[0], "1": model[1]}


def test_a_wildcard_stays_on_its_level():
    model = nn.Sequential(mlp(), nn.Linear(CLASSES, 2))
    assert list(resolve_boundaries(model, ["0.*"])) == ["0.0", "0.1", "0.2"]


def test_the_pattern_for_the_rest_reaches_every_level():
    assert choose_by_pattern("encoder.layers.3", {"head": 1, "*": 2}, "estimator") == 2


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(BoundaryError, match=r"got 'encodr'\. Did you mean 'encoder'\?"):
        DNIEngine(nn.ModuleDict({"encoder": nn.Linear(1, 1)}), ["encodr"], Told)


def test_a_pattern_without_a_match_is_refused():
    with pytest.raises(BoundaryError, match=r"got 'zz\*'"):
        DNIEngine(mlp(), ["0", "zz*"], Told)


@pytest.mark.parametrize("nothing", [[], (), "0"])
def test_no_list_of_names_is_refused(nothing):
    with pytest.raises(BoundaryError, match=r"non-empty list of submodule names.*children.*'0', '1', '2'"):
        DNIEngine(mlp(), nothing, Told)


def test_two_names_of_one_module_are_refused():
    shared = nn.Linear(2, 2)
    with pytest.raises(BoundaryError, match=r"'0' and '2' are the same module object.*Name it once"):
        DNIEngine(nn.Sequential(shared, nn.ReLU(), shared), ["0", "2"], Told)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("places", [{"boundaries": ["0"]}, {"boundaries": [], "truncations": ["0"]}])
def test_what_torch_jit_has_made_is_refused_and_may_be_wrapped(places):
    """It takes no hooks."""
    scripted = torch.jit.script(nn.LSTM(2, 3) if "truncations" in places else nn.Linear(2, 3))
    with pytest.raises(BoundaryError, match="to name modules that take hooks, but '0' was made by"):
        DNIEngine(nn.Sequential(scripted), estimator=Told, **places)
    assert DNIEngine(nn.Sequential(nn.Sequential(scripted)), estimator=Told, **places).boundaries == ("0",)


@pytest.mark.parametrize("places", [{"boundaries": "core"}, {"boundaries": [], "truncations": "core"}])
def test_a_single_name_is_no_list_of_names(places):
    model = nn.ModuleDict({"core": nn.LSTM(2, 3)})
    with pytest.raises(BoundaryError, match="to be a non-empty list of submodule names, but got 'core'"):
        DNIEngine(model, estimator=Told, **places)


def test_a_spec_describes_every_leaf_without_its_rows():
    spec = BoundarySpec.of("b", [torch.zeros(8, 3, 4), torch.zeros(8, 2, dtype=torch.float64)])
    assert spec.leaves == (LeafSpec((3, 4), torch.float32), LeafSpec((2,), torch.float64))


def test_a_spec_of_one_leaf_has_its_shape():
    assert BoundarySpec.of("b", [torch.zeros(8, 3, 4)]).shape == (3, 4)


def test_a_spec_of_two_leaves_has_no_single_shape():
    spec = BoundarySpec.of("b", [torch.zeros(8, 3), torch.zeros(8, 2)])
    with pytest.raises(BoundaryError, match="Expected one tensor at boundary 'b', but got 2"):
        _ = spec.shape


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


def test_an_output_without_rows_is_refused():
    model = nn.Sequential(nn.Linear(5, 2).double(), Total())
    engine = attached(model, ["1"])
    with pytest.raises(BoundaryError, match=r"boundary '1' to have a batch dimension, but got.*\(\)"):
        run_step(engine, model, blobs(), lambda out, y: out)


def test_a_spec_survives_its_state():
    spec = BoundarySpec.of("b", [torch.zeros(8, 3, 4, dtype=torch.bfloat16), torch.zeros(8, 2)])
    assert BoundarySpec.from_state_dict(spec.state_dict(), torch.device("cpu")) == spec


def test_the_first_matching_pattern_chooses():
    choice = {"net.1": 1, "net.*": 2, "*": 3}
    assert [choose_by_pattern(n, choice, "bp_lambda") for n in ("net.1", "net.2", "head")] == [1, 2, 3]


def test_a_boundary_without_a_choice_is_refused():
    with pytest.raises(BoundaryError, match=r"pattern in `bp_lambda` to match boundary '1'.*\['0'\]"):
        DNIEngine(mlp(), ["0", "1"], Told, bp_lambda={"0": 1.0})
