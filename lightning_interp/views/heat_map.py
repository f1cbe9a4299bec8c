"""Similarity maps drawn as heat maps, with Pillow: a run writes dozens of them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from lightning_interp.similarity.results import SimilarityMap
from lightning_interp.views.canvas import GAP, INK, PAPER, Pixels, paragraph, side_by_side, stacked, text_mask, typeface
from lightning_interp.views.colour_scale import TICK, TITLE_TYPE, ColourScale

# Numbers in more cells than 10 × 10 are too small to read in a report.
MOST_CELLS_WITH_NUMBERS = 100
# More names at an axis would overlap: the map stops growing at 24 cells.
MOST_TICKS_PER_AXIS, MOST_CELLS_IN_FULL_SIZE = 30, 24
# Characters of a layer's name: longer ones would take more room than the map.
LONGEST_LAYER_NAME = 32
# The size of a cell in pixels, with room for a number such as -0.12, and of the smallest map, with room for its legend.
CELL_WIDTH, CELL_HEIGHT = 46, 38
NARROWEST_MAP, LOWEST_MAP = 320, 220
# The size of type of the numbers in cells and the note below, in pixels.
NUMBER_TYPE = 12
GREY, HATCH_PAPER, HATCH_INK = (77, 77, 77), (230, 230, 230), (179, 179, 179)


def heat_map(table: SimilarityMap) -> Pixels:
    """Draw a similarity map, 0 (dark) to 1 (bright), with a number in each cell where there is room.

    Values on a scale of their own go from the least to the largest. Of long layer names only the end is shown. Cells
    without a value (NaN) are hatched grey. The caption names the number of samples, and the reasons for caution.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    values = np.ma.masked_invalid(table.values.detach().cpu().double().numpy())
    scale = ColourScale(*_colour_range(table, values), reverse=table.distance)
    cells = _cells(values, scale)
    bar = scale.bar(cells.height, values, table.legend or _meaning_of_the_scale(table))
    body = side_by_side([_with_axes(cells, table), bar], gap=2 * GAP)
    title = paragraph(f"{table.measure}: {table.title}", TITLE_TYPE, body.width)
    note = paragraph(f"n = {table.n} probe samples. {table.note}", NUMBER_TYPE, body.width, GREY)
    return np.asarray(ImageOps.expand(stacked([title, body, note]), GAP, PAPER))


def _meaning_of_the_scale(table: SimilarityMap) -> str:
    if table.own_scale:
        return "the function's own scale"
    return "0: same" if table.distance else "1: same, 0: unrelated"


def _colour_range(table: SimilarityMap, values: np.ma.MaskedArray) -> tuple[float, float]:
    """Return the values at the ends of the colour scale."""
    if not values.count():
        return 0, 1
    least, largest = float(values.min()), float(values.max())
    if table.own_scale:
        return (least, largest) if least < largest else (least - 0.5, largest + 0.5)
    if table.distance:
        return 0, max(np.pi / 2, largest)
    return -0.005, 1 + 1e-6  # values that read 0.00 or 1.00 are inside the scale


def _cells(values: np.ma.MaskedArray, scale: ColourScale) -> Image.Image:
    """Draw the cells in a frame; a cell without a value shows the hatched ground."""
    rows, columns = (min(count, MOST_CELLS_IN_FULL_SIZE) for count in values.shape)
    size = (max(NARROWEST_MAP, CELL_WIDTH * columns), max(LOWEST_MAP, CELL_HEIGHT * rows))
    sheet = _hatched(size)
    mask = Image.fromarray(~np.ma.getmaskarray(values)).convert("L")
    colours = Image.fromarray(scale.colours(values))
    nearest = Image.Resampling.NEAREST
    sheet.paste(colours.resize(size, nearest), (0, 0), mask.resize(size, nearest))
    if values.size <= MOST_CELLS_WITH_NUMBERS:
        _write_numbers(sheet, values, scale)
    ImageDraw.Draw(sheet).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=INK)
    return sheet


def _hatched(size: tuple[int, int]) -> Image.Image:
    sheet = Image.new("RGB", size, HATCH_PAPER)
    pen = ImageDraw.Draw(sheet)
    width, height = size
    for x in range(-height, width, 10):
        pen.line(((x, height), (x + height, 0)), HATCH_INK)
    return sheet


def _write_numbers(sheet: Image.Image, values: np.ma.MaskedArray, scale: ColourScale) -> None:
    """Write each cell's value, unless cells are too narrow for it; black on light colours, white on dark ones."""
    font, pen = typeface(NUMBER_TYPE), ImageDraw.Draw(sheet)
    width, height = sheet.width / values.shape[1], sheet.height / values.shape[0]
    if any(font.getlength(f"{value:.2f}") > width - 6 for value in values.compressed()) or height < 1.2 * NUMBER_TYPE:
        return
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        ink = GREY if np.isnan(value) else INK if scale.is_light(value) else PAPER
        pen.text((width * (column + 0.5), height * (row + 0.5)), text, ink, font, anchor="mm")


def _with_axes(cells: Image.Image, table: SimilarityMap) -> Image.Image:
    """Return the cells with names at the left and below, a title along both axes, and GAP free above."""
    slope = 45 if max(map(len, table.columns)) > 3 else 0  # short names, such as epochs, stay level
    row_names, column_names = _names(table.rows, cells.height), _names(table.columns, cells.width, slope)
    row_title = paragraph(table.row_title, TITLE_TYPE, cells.height, centred=True).transpose(Image.Transpose.ROTATE_90)
    column_title = paragraph(table.column_title, TITLE_TYPE, cells.width, centred=True)
    names_left = GAP + TICK + max(mask.width for _, mask in row_names)
    left = max(row_title.width + names_left, *(mask.width - x for x, mask in column_names))
    names_top = GAP + cells.height + TICK
    title_top = names_top + max(mask.height for _, mask in column_names)
    sheet = Image.new("RGB", (left + cells.width + GAP, title_top + column_title.height), PAPER)
    middle = GAP + cells.height // 2
    sheet.paste(row_title, (left - names_left - row_title.width, max(0, middle - row_title.height // 2)))
    sheet.paste(column_title, (left + (cells.width - column_title.width) // 2, title_top))
    sheet.paste(cells, (left, GAP))
    _write_row_names(sheet, left, row_names)
    _write_column_names(sheet, left, names_top, column_names, bool(slope))
    return sheet


def _names(names: tuple[str, ...], length: int, slope: int = 0) -> list[tuple[int, Image.Image]]:
    """Return the names at an axis of `length` pixels: the middle of each one's cells, and the mask of its letters."""
    stride = -(-len(names) // MOST_TICKS_PER_AXIS)
    return [
        (round(length * (index + 0.5) / len(names)), text_mask(_without_front(names[index]), TITLE_TYPE, slope))
        for index in range(0, len(names), stride)
    ]


def _without_front(name: str) -> str:
    return name if len(name) <= LONGEST_LAYER_NAME else f"…{name[1 - LONGEST_LAYER_NAME :]}"


def _write_row_names(sheet: Image.Image, left: int, names: list[tuple[int, Image.Image]]) -> None:
    pen = ImageDraw.Draw(sheet)
    for y, mask in names:
        pen.line(((left - TICK, GAP + y), (left, GAP + y)), INK)
        sheet.paste(INK, (left - TICK - 3 - mask.width, GAP + y - mask.height // 2), mask)


def _write_column_names(
    sheet: Image.Image, left: int, top: int, names: list[tuple[int, Image.Image]], sloping: bool
) -> None:
    """Write the names below their ticks: level ones at the middle, sloping ones so that they end at the tick."""
    pen = ImageDraw.Draw(sheet)
    for x, mask in names:
        pen.line(((left + x, top - TICK), (left + x, top)), INK)
        right = x + TITLE_TYPE // 2 if sloping else x + mask.width // 2
        sheet.paste(INK, (left + right - mask.width, top), mask)
