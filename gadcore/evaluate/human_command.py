"""python -m gadcore.run sheet, and tally: two models' responses judged blind by people."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, Field

from gadcore.config import loading
from gadcore.config.kinds import Location, NonNegative, Positive, Section
from gadcore.errors import UserError
from gadcore.evaluate.human import make_sheet
from gadcore.evaluate.human_tally import markdown, tally
from gadcore.evaluate.judge_rows import find, read_both
from gadcore.evaluate.responses import write_json
from gadcore.files import write_whole
from gadcore.record.reading import read_json
from gadcore.text import say


class SheetSettings(Section):
    """Which responses stand side by side."""

    responses: Location = Field("runs/eval", description="Folder that eval wrote: <set>/<model>.jsonl.")
    set: str = Field("", description="The set by name; may be left out where there is only one.")
    a: str = Field("", description="The model whose wins are counted; must be given.")
    b: str = Field("", description="The model that it is compared with; must be given.")
    prompts: Positive | None = Field(50, description="How many, drawn at random; none: all.")
    seed: NonNegative = Field(0, description="Of the choice, of the order and of the sides.")
    title: str = Field("Which answer is better?", description="Heading of the sheet; raters read it.")
    out: Location = Field("sheet", description="Folder for sheet.html and key.json.")


class SheetConfig(Section):
    """A blind sheet for people to judge two models' responses: one HTML file that stands alone, and its key."""

    model_config = ConfigDict(title="sheet")

    sheet: SheetSettings = SheetSettings()


def sheet_main(arguments: list[str]) -> int:
    """Writes <out>/sheet.html and <out>/key.json, and never over another sheet."""
    config = loading.load(arguments, SheetConfig).sheet
    if not config.a or not config.b:
        raise UserError("two models are needed: --sheet.a NAME --sheet.b NAME")
    wanted = (config.set,) if config.set else ()
    sets = sorted({name for name, _ in find(config.responses, wanted, (config.a, config.b))})
    if len(sets) > 1:
        raise UserError(f"{config.responses} holds several sets, {', '.join(sets)}: name one by --sheet.set")
    a, b = read_both(Path(config.responses) / sets[0], (config.a, config.b))
    sheet = make_sheet(
        (config.a, a), (config.b, b), set_name=sets[0], title=config.title, seed=config.seed, prompts=config.prompts
    )
    out = Path(config.out)
    page, key = out / "sheet.html", out / "key.json"
    if key.exists() and read_json(key).get("sheet") != sheet.key["sheet"]:
        raise UserError(f"{key} belongs to another sheet, whose answers need it: choose another folder by --sheet.out")
    write_json(key, sheet.key)
    write_whole(page, sheet.page)
    say(f"{page}: {len(sheet.key['pairs'])} prompts; give this file to the raters and keep {key} to yourself")
    return 0


def tally_main(arguments: list[str]) -> int:
    """tally KEY.json ANSWERS.json ..: prints the table, and writes it beside the key as tally.json and tally.md."""
    if len(arguments) < 2 or any(argument.startswith("-") for argument in arguments):
        raise UserError("write: tally KEY.json ANSWERS.json [ANSWERS.json ..]")
    key, *answers = map(Path, arguments)
    result = tally(key, answers)
    text = markdown(result)
    write_json(key.parent / "tally.json", result)
    write_whole(key.parent / "tally.md", text)
    for line in text.removesuffix("\n").split("\n"):
        say(line)
    return 0
