"""Lightning's view of the engine; importing this registers the strategies by name."""

from lightning_dni.strategies._compat import StrategyRegistry
from lightning_dni.strategies.ddp import DNIDDPStrategy
from lightning_dni.strategies.pipeline import DNIPipelineStrategy
from lightning_dni.strategies.sharding import consolidate
from lightning_dni.strategies.single_device import DNIStrategy

StrategyRegistry.register(
    DNIStrategy.strategy_name,
    DNIStrategy,
    description="Synthetic gradients (decoupled neural interfaces) on one device",
    override=True,  # importing twice is no mistake
)
StrategyRegistry.register(
    DNIDDPStrategy.strategy_name,
    DNIDDPStrategy,
    description="Synthetic gradients (decoupled neural interfaces) in several processes, data-parallel",
    override=True,
)

StrategyRegistry.register(
    DNIPipelineStrategy.strategy_name,
    DNIPipelineStrategy,
    description="Synthetic gradients (decoupled neural interfaces), every stage in a process of its own",
    override=True,
)

__all__ = ["DNIDDPStrategy", "DNIPipelineStrategy", "DNIStrategy", "consolidate"]
