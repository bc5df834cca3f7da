"""What a fit at truncations holds: over accumulated batches, and in a checkpoint of weights alone."""

import copy

import torch
from core.recurrent import BATCH, Net, begin_anew, loss_of, rows_of_state
from lightning.pytorch.callbacks import ModelCheckpoint
from strategies.test_truncations import DESCENT, Reader, chunks_of, fit, strategy
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from lightning_dni.estimators import LinearEstimator

RATE, CLIP, EACH = 0.1, 0.3, 2


def test_accumulated_and_clipped_chunks_are_those_of_a_loop_written_by_hand():
    """Both optimizers step after two chunks, the last of five alone; the net's gradients are clipped."""
    module, twin, chunks = Reader(), Net(), chunks_of(5)
    twin.load_state_dict(copy.deepcopy(module.net.state_dict()))
    fit(module, strategy(damping=0.5), chunks, accumulate_grad_batches=EACH, gradient_clip_val=CLIP)
    width = 2 * (2 + 3)
    learnt = [torch.zeros(width, width).double(), torch.zeros(width).double()]
    for p in learnt:
        p.requires_grad_()
    optimizers = DESCENT(twin.parameters()), torch.optim.SGD(learnt, lr=RATE)
    state = before = None
    for k, (x, y, anew) in enumerate(chunks):
        if state is not None:
            state = begin_anew(twin, state, anew)
            state = pytree.tree_map(lambda s: s.detach().requires_grad_(), state)
        out, left = twin(x, state)
        h = rows_of_state(twin, left)
        said = (h @ learnt[0].t() + learnt[1]).detach()
        (loss_of(out, y) / EACH + 0.5 * (said * h).sum() / BATCH / EACH).backward()
        if state is not None:
            target = rows_of_state(twin, pytree.tree_map(lambda s: s.grad, state)) * BATCH * EACH
            error = before @ learnt[0].t() + learnt[1] - target * ~anew.unsqueeze(1)
            (error.square().sum() / BATCH / EACH).backward()
        before, state = h.detach(), left
        if k % EACH == EACH - 1 or k == len(chunks) - 1:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_close(list(module.net.parameters()), list(twin.parameters()), rtol=1e-10, atol=1e-10)


def test_weights_that_are_saved_alone_come_without_the_states_of_a_batch(tmp_path):
    for alone in (True, False):
        keep = ModelCheckpoint(dirpath=tmp_path, filename=str(alone), save_weights_only=alone)
        fit(Reader(), strategy(LinearEstimator), chunks_of(2), callbacks=[keep], enable_checkpointing=True)
        saved = torch.load(tmp_path / f"{alone}.ckpt", weights_only=True)["lightning_dni"]
        assert ("truncations" in saved) is not alone
