"""Both ends of a way in one process."""

import pytest
import torch

from lightning_dni.errors import StageError
from lightning_dni.pipeline.local import LocalChannel
from lightning_dni.pipeline.message import Inlet, Kind, Message, Outlet


def test_first_in_first_out():
    channel = LocalChannel()
    assert isinstance(channel, Inlet)
    assert isinstance(channel, Outlet)
    sent = [Message(k, Kind.TRAIN, (torch.zeros(k),)) for k in range(3)]
    for message in sent:
        channel.send(message)
    assert len(channel) == 3
    assert [channel.receive() for _ in sent] == sent


def test_nobody_could_send_what_is_missing():
    with pytest.raises(
        StageError, match=r"Expected a gradient of stage 2, got none: .* Run that stage first"
    ):
        LocalChannel("gradient of stage 2").receive()
