"""Random values of every node's widgets, as ComfyUI lets them through to the node."""

import asyncio
import json
import math
import random
from pathlib import Path

import torch
from comfyui_deltaconv.deltaconv import DeltaConvBlock
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks
from fuzzing import ODD, changed
from locality_reports import small_report


class Reached(BaseException):
    """The inputs were taken: the node asks for its model."""


class Unasked:
    """In place of a model, a CLIP, a VAE: whatever a node asks of it ends the node."""

    def __getattr__(self, name):
        raise Reached(name)

    def __iter__(self):
        raise Reached("iter")

    def __len__(self):
        raise Reached("len")

    def __getitem__(self, key):
        raise Reached(key)


# Characters of a text.
LONGEST = 20_000
# They draw or write, whatever they are told: few inputs go to them.
SLOW = {"DeltaConvCompare", "DeltaConvSave", "DeltaConvSaveLocality"}


def cast(entry, value):
    """What ComfyUI makes of a value for this input; ValueError where it refuses it.

    It casts, and holds numbers against their bounds, which a NaN passes.
    """
    kind = entry.get_io_type()
    if kind == "INT":
        value = int(value)
    elif kind == "FLOAT":
        value = float(value)
    elif kind == "STRING":
        value = str(value)[:LONGEST]
    elif kind == "BOOLEAN":
        value = bool(value)
    if kind in ("INT", "FLOAT") and (value < entry.min or value > entry.max):
        raise ValueError("out of bounds")
    return value


def default_of(entry):
    """The value of a widget that nobody touched; None for an input that is linked."""
    default = getattr(entry, "default", None)
    return entry.options[0] if default is None and entry.get_io_type() == "COMBO" else default


class Nodes:
    """Every node, and what its linked inputs get here."""

    # A self-test takes seconds whatever it is told; the demo's model takes no input.
    WITHOUT_RUN = ("DeltaConvSelfTest", "DeltaConvDemoModel")

    def __init__(self, folder: Path):
        import folder_paths
        from comfyui_deltaconv.nodes.extension import DeltaConvExtension

        async def nodes():
            extension = DeltaConvExtension()
            await extension.on_load()
            return await extension.get_node_list()

        found = asyncio.run(nodes())
        self.nodes = {node.GET_SCHEMA().node_id: node for node in found}
        self.output = Path(folder_paths.get_output_directory())
        self.count = 0
        torch.manual_seed(0)
        block = DeltaConvBlock(4, 3)
        latent, picture = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3)
        self.linked = {
            "DELTACONV": weights_of_blocks({"blocks.0.attn": block}),
            "DELTACONV_LOCALITY": small_report(),
            "LATENT": {"samples": latent},
            "IMAGE": picture,
        }
        self.refused = (ValueError, OSError)
        seeds = list(self._seeds())
        self.seeds = [json.dumps(entry).encode() for entry in seeds]
        quick = [entry for entry in seeds if entry["inputs"] and entry["node"] not in SLOW]
        self.quick = [json.dumps(entry).encode() for entry in quick]

    def _seeds(self):
        first = {"text": "red apple"}
        yield {"node": "DeltaConvDemoPrompt", "inputs": first}
        for name, node in self.nodes.items():
            values = {
                entry.id: default_of(entry)
                for entry in node.GET_SCHEMA().inputs
                if entry.get_io_type() not in self.linked
            }
            yield {"node": name, "inputs": {k: v for k, v in values.items() if v is not None}}

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        """One value of the node replaced, or its text changed; now and then another node."""
        asked = json.loads(data)
        if not asked["inputs"] or (asked["node"] in SLOW and rng.random() < 0.98):
            return self.changed(rng.choice(self.quick), rng)
        name = rng.choice(list(asked["inputs"]))
        value = asked["inputs"][name]
        if isinstance(value, str) and rng.random() < 0.7:
            value = changed(value.encode(errors="replace"), rng).decode(errors="replace")
        else:
            value = rng.choice(ODD)
        return json.dumps({**asked, "inputs": {**asked["inputs"], name: value}}).encode()

    def read(self, data: bytes) -> bool:
        """Run the named node on its inputs, up to its model → whether it took them."""
        try:
            asked = json.loads(data)
            node, values = self.nodes[asked["node"]], dict(asked["inputs"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        schema, given = node.GET_SCHEMA(), {}
        several = bool(schema.is_input_list)
        checked = node.validate_inputs.__func__.__code__.co_varnames if self._checks(node) else ()
        for entry in schema.inputs:
            kind = entry.get_io_type()
            if entry.id in values and default_of(entry) is not None:
                try:
                    value = cast(entry, values[entry.id])
                except (ValueError, TypeError, OverflowError):
                    return False
                if kind == "COMBO" and value not in entry.options and entry.id not in checked:
                    return False
            elif kind in self.linked:
                value = self.linked[kind]
            elif entry.optional:
                continue
            elif default_of(entry) is not None:
                value = default_of(entry)
            else:
                value = Unasked()
            given[entry.id] = [value] if several else value
        return self._run(schema.node_id, node, given, checked)

    @staticmethod
    def _checks(node) -> bool:
        return "validate_inputs" in vars(node)

    def _run(self, name, node, given, checked) -> bool:
        if checked:
            answer = node.validate_inputs(**{k: v for k, v in given.items() if k in checked})
            if answer is not True:
                assert isinstance(answer, str) and len(answer) < 30_000
                return False
        if name in self.WITHOUT_RUN:
            return True
        try:
            result = node.execute(**given)
            if name == "DeltaConvDistillSettings":
                self._distil(result.args[0])
        except Reached:
            return True
        except self.refused as error:
            assert str(error)
            return False
        except Exception as error:
            # ComfyUI's own refusal of a name that leads out.
            if "outside the output folder" in str(error):
                return False
            raise
        finally:
            self._tidy()
        return True

    def _distil(self, options) -> None:
        """Settings are looked at by the node that they go to."""
        node = self.nodes["DeltaConvDistill"]
        node.execute([Unasked()], ["a"], ["fastest"], [math.pi], [""], settings=[options])

    def _tidy(self) -> None:
        self.count += 1
        if self.count % 100 == 0:
            # By full paths, which who watches can follow.
            for path in sorted(self.output.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
