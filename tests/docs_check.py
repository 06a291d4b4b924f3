"""Check that the tables in docs/ and README.md say what the code says; `--write` makes them so.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is one of `TABLES`.
"""

import inspect
import json
import re
import sys
from pathlib import Path

import torch
import typer

import sqdm
from fpga import protocol
from golden import network, presets, recipes, tradeoff
from hw import config, descriptor, registers

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(head, rows):
    """A Markdown table; cells are converted by str()."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n"
                   for line in lines)


def comments(kind):
    """The comment at the end of the line that defines each member of the class `kind`."""
    found = re.findall(r"^    (\w+)(?:: \w+)? = [^#\n]*# *(.*)$", inspect.getsource(kind),
                       re.MULTILINE)
    return dict(found)


def parameters():
    """Fields of the configuration, their values in the presets, and how the yardsticks differ."""
    meaning = comments(config.Config)
    fields = {name: preset.as_dict() for name, preset in config.PRESETS.items()}
    yardsticks = {name: name.removesuffix("-dense") for name in fields if name.endswith("-dense")}
    columns = [name for name in fields if name not in yardsticks]
    rows = [[f"`{field}`", *(fields[name][field] for name in columns), meaning.get(field, "")]
            for field in config.TINY.as_dict() if field != "name"]
    lines = []
    for name, base in yardsticks.items():
        others = ", ".join(f"`{field}` {value}" for field, value in fields[name].items()
                           if field != "name" and value != fields[base][field])
        lines.append(f"`{name}` is `{base}` with {others}.\n")
    return (table(["field", *(f"`{name}`" for name in columns), "meaning"], rows)
            + "\n" + "".join(lines))


def bits(low, count):
    return f"{low + count - 1}:{low}" if count > 1 else low


def register_map():
    """Registers and their fields."""
    rows = []
    for name, (number, access, fields) in registers.REGISTERS.items():
        for field, (low, count, meaning) in fields.items():
            rows.append([number, f"`{name}`", access, bits(low, count), f"`{field}`", meaning])
    return table(["number", "register", "access", "bits", "field", "meaning"], rows)


def descriptor_fields():
    """Fields of the layer descriptor."""
    rows = [[word, bits(low, count), f"`{name}`", meaning]
            for name, (word, low, count, meaning) in descriptor.FIELDS.items()]
    return table(["word", "bits", "field", "meaning"], rows)


def members(kind):
    """Members of an enumeration."""
    meaning = comments(kind)
    rows = [[member.value, f"`{member.name}`", meaning.get(member.name, "")] for member in kind]
    return table(["value", "name", "meaning"], rows)


def commands():
    """Subcommands of sqdm."""
    group = typer.main.get_command(sqdm.app)
    rows = [[f"`sqdm {name}`", command.get_short_help_str(200)]
            for name, command in sorted(group.commands.items())]
    return table(["command", "what it does"], rows)


def networks():
    """The preset architectures, their parameters and the work of an evaluation."""
    rows = []
    for name, architecture in presets.PRESETS.items():
        with torch.device("meta"):
            unet = network.build(architecture)
        work = {kind: f"{count / 1e9:.2f}" for kind, count in network.macs(unet).items()}
        parameters = sum(value.numel() for value in unet.parameters()) / 1e6
        size = f"{architecture.resolution}x{architecture.resolution}"
        rows.append([f"`{name}`", type(unet).__name__, size, f"{parameters:.2f} M", work["total"],
                     work["convolution"], work["attention"]])
    return table(["preset", "network", "pixels", "parameters", "GMACs an evaluation",
                  "of them convolutions", "attention"], rows)


def training_recipes():
    """The training recipes."""
    rows = []
    for name, recipe in recipes.RECIPES.items():
        with torch.device("meta"):
            unet = network.build(recipe.architecture)
        parameters = sum(value.numel() for value in unet.parameters()) / 1e6
        start = f"`{recipe.finetune.start}`" if recipe.finetune else "random weights"
        zeros = f"{recipe.finetune.zeros:.0%}" if recipe.finetune else ""
        rows.append([f"`{name}`", f"{parameters:.2f} M", recipe.architecture.activation,
                     recipe.dataset, recipe.batch, f"{recipe.steps:,}", recipe.learning_rate, start,
                     zeros])
    return table(["recipe", "parameters", "activation", "data", "images a step", "steps",
                  "learning rate", "from", "zeros aimed at"], rows)


def zeros_quality():
    """What zeros cost, as measured."""
    path = Path(__file__).parent.parent / "docs/zeros_quality.json"
    return tradeoff.markdown(json.loads(path.read_text())["points"]) + "\n"


TABLES = {
    "networks": networks,
    "recipes": training_recipes,
    "zeros": zeros_quality,
    "parameters": parameters,
    "registers": register_map,
    "descriptor": descriptor_fields,
    "formats": lambda: members(descriptor.Format),
    "errors": lambda: members(descriptor.Error),
    "statuses": lambda: members(protocol.Status),
    "commands": commands,
}


def filled(text):
    """`text` with every marked block as the code has it.

    Raises
    ------
    ValueError
        If a block has an unknown name or no end.
    """
    def fill(match):
        if match[2] not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, not {match[2]!r}")
        return match[1] + TABLES[match[2]]() + match[4]

    if len(re.findall("<!-- table: ", text)) != len(BLOCK.findall(text)):
        raise ValueError("every table must have a line <!-- end --> after it")
    return BLOCK.sub(fill, text)


def pages(root):
    """The pages that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("**/*.md"))]


def broken_links(path):
    """Relative links of a page that lead nowhere."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    return [link for link in links
            if "://" not in link and not (path.parent / link).exists()]


def main(write):
    """Check or write all pages; the number of wrong ones."""
    root = Path(__file__).parent.parent
    wrong = 0
    for path in pages(root):
        name = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        try:
            right = filled(text)
        except ValueError as error:
            print(f"{name}: {error}")
            wrong += 1
            continue
        if write:
            path.write_text(right, encoding="utf-8")
        elif right != text:
            print(f"{name}: its tables differ from the code; run"
                  " python -m tests.docs_check --write")
            wrong += 1
        for link in broken_links(path):
            print(f"{name}: link {link} leads nowhere")
            wrong += 1
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(write=sys.argv[1:] == ["--write"]) else 0)
