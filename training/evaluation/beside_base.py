"""What a bundle saves against a HuBERT Base (Hsu et al. 2021) of the same task heads, timed in the same run.

Its weights are drawn at random, which changes neither its size nor its time: how well such a model does is for a study
of fine-tuned ones (`sotto study training/recipes/full-size.yaml`).
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import HubertConfig, HubertModel

from model_store import Bundle
from model_store.graph import outputs_of, part_of
from training.evaluation.cost import Latency, latencies_ms
from training.export import graph_of
from training.students.joint import JointModel
from training.teachers import SelfSupervised

RUNS = 60
SPEAKER_DIM = 192  # where the bundle has none to compare with


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes of the clip graphs, and milliseconds for one second of audio."""

    own_bytes: int
    base_bytes: int
    own: Latency
    base: Latency
    parameters: int

    @property
    def smaller(self) -> float:
        return 1 - self.own_bytes / self.base_bytes

    @property
    def faster(self) -> float:
        """Share of its time that is saved, on one thread."""
        return 1 - self.own.one_thread / self.base.one_thread


def beside_base(bundle: Bundle, config: HubertConfig | None = None, *, runs: int | None = None) -> Beside:
    """`config` is HuBERT Base's by default."""
    manifest = bundle.manifest
    trunk = SelfSupervised(HubertModel(config or HubertConfig()), normalise=False)
    speaker_dim = SPEAKER_DIM if manifest.speaker is None else manifest.speaker.dim
    network = JointModel(trunk, 1 + len(manifest.keywords.labels), speaker_dim=speaker_dim).eval()
    # Beside a bundle that knows keywords only, it does no more than that.
    graph = part_of(graph_of(network), outputs_of(manifest))
    own = bundle.read(manifest.graph.file)
    latencies = latencies_ms({"own": own, "base": graph}, runs=runs or RUNS)
    return Beside(
        own_bytes=len(own),
        base_bytes=len(graph),
        own=latencies["own"],
        base=latencies["base"],
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
