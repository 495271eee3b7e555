"""Roll-outs to look at: a video of many side by side, how each ended, the table from above, an animation for a page.

Knows: finished worlds and how to draw them.
Must not know: policies, what is reported in words.
"""

import cv2
import numpy as np

from sim.scene import Renderer, block_corners
from ur10e import tool_tip

# Okabe and Ito's, which people with any colour vision can tell apart.
DONE_RGB, FAILED_RGB, OPEN_RGB = (0, 158, 115), (213, 94, 0), (90, 94, 100)
VIDEO_FPS, VIDEO_COLUMNS, VIDEO_ROWS, VIDEO_TILE = 15, 4, 3, (180, 240)
GIF_FPS, GIF_COLUMNS, GIF_ROWS, GIF_TILE = 10, 4, 2, (150, 200)
GIF_MAX_BYTES = 3_000_000
HOLD_S = 1.0  # the last picture stays so long
SHEET_COLUMNS, SHEET_TILE, SHEET_EPISODES = 10, (90, 120), 50
BORDER_PX, CAPTION_PX = 3, 26


class Stage:
    """The roll-outs of some worlds side by side, at any moment.

    Args:
        worlds: finished ones.
        outcomes: their sim.world.Outcome.
        columns: tiles in a row.
        tile: (H, W) of each, pixels.
    """

    def __init__(self, worlds, outcomes, columns, tile):
        self._worlds, self._outcomes, self._columns, self._tile = worlds, outcomes, columns, tile
        self._renderers = [Renderer(world.scene, *tile) for world in worlds]
        self.end_s = max(world.time_s for world in worlds)

    def draw(self, at_s):
        """(H, W, 3) uint8 RGB: a green frame where the tip has touched, an orange one where the time ran out."""
        tiles, touched = [], 0
        for world, outcome, renderer in zip(self._worlds, self._outcomes, self._renderers, strict=True):
            done = outcome.touch_s is not None and outcome.touch_s <= at_s
            touched += done
            colour = DONE_RGB if done else FAILED_RGB if at_s >= world.time_s else OPEN_RGB
            tiles.append(framed(renderer.render(world.pose_rad(at_s)), colour))
        return captioned(grid(tiles, self._columns), f"{at_s:.1f} s   {touched} of {len(tiles)} have touched the block")


def framed(image, colour):
    """An image with a coloured frame drawn over its rim."""
    image = image.copy()
    height, width = image.shape[:2]
    cv2.rectangle(image, (0, 0), (width - 1, height - 1), colour, 2 * BORDER_PX - 1)
    return image


def grid(tiles, columns):
    """Tiles of one size in rows; what is left over is dark."""
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    rows[-1] += [np.full_like(tiles[0], 30)] * (min(columns, len(tiles)) - len(rows[-1]))
    return np.vstack([np.hstack(row) for row in rows])


def captioned(image, text):
    """The image with a line of text below it; both sides even, as video encoders want them."""
    height, width = image.shape[:2]
    strip = np.full((CAPTION_PX + (height + CAPTION_PX) % 2, width, 3), 30, np.uint8)
    cv2.putText(strip, text, (8, CAPTION_PX - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (235, 235, 235), 1, cv2.LINE_AA)
    return np.vstack([image, strip])[:, : width - width % 2]


def write_video(path, worlds, outcomes):
    """An H.264 MP4 of the first roll-outs, VIDEO_COLUMNS x VIDEO_ROWS of them, whatever became of them."""
    import av

    shown = VIDEO_COLUMNS * VIDEO_ROWS
    stage = Stage(worlds[:shown], outcomes[:shown], VIDEO_COLUMNS, VIDEO_TILE)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = None
        for frame in _frames(stage, VIDEO_FPS):
            if stream is None:
                stream = container.add_stream("h264", rate=VIDEO_FPS)
                stream.height, stream.width, _ = frame.shape
                stream.pix_fmt = "yuv420p"  # what browsers play
                stream.options = {"crf": "24", "preset": "veryfast"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_gif(path, worlds, outcomes):
    """An animation of the first roll-outs, GIF_COLUMNS x GIF_ROWS of them, that ends when the last one has touched.

    Returns:
        Its size in bytes. Fewer colours are taken as long as it is above GIF_MAX_BYTES and there are any to spare.
    """
    shown = GIF_COLUMNS * GIF_ROWS
    worlds, outcomes = worlds[:shown], outcomes[:shown]
    stage = Stage(worlds, outcomes, GIF_COLUMNS, GIF_TILE)
    if all(outcome.success for outcome in outcomes):
        stage.end_s = min(stage.end_s, max(outcome.touch_s for outcome in outcomes) + HOLD_S)
    frames = list(_frames(stage, GIF_FPS))
    for colours in (256, 128, 64):
        _write_gif(path, frames, colours)
        if path.stat().st_size <= GIF_MAX_BYTES:
            break
    return path.stat().st_size


def _write_gif(path, frames, colours):
    """One palette for all frames; a pixel that stays is transparent, which compresses to nearly nothing."""
    from PIL import Image

    samples = Image.fromarray(np.vstack([frames[0], frames[len(frames) // 2], frames[-1]]))
    palette = samples.quantize(colours - 1, dither=Image.Dither.NONE)
    transparent, pages, shown = colours - 1, [], None
    for frame in frames:
        indices = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        page = indices if shown is None else np.where(indices == shown, transparent, indices)
        shown = indices
        pages.append(Image.fromarray(page.astype(np.uint8), "P"))
        pages[-1].putpalette(palette.getpalette()[: 3 * transparent] + [0, 0, 0])
    pages[0].save(
        path, "GIF", save_all=True, append_images=pages[1:], duration=round(1e3 / GIF_FPS), loop=0,
        transparency=transparent, disposal=1, optimize=False,
    )  # fmt: skip


def _frames(stage, fps):
    """The stage from start to end, and its last picture for HOLD_S more."""
    count = round(stage.end_s * fps) + 1
    for i in range(count):
        last = stage.draw(i / fps)
        yield last
    for _ in range(round(HOLD_S * fps)):
        yield last


def contact_sheet(worlds, outcomes):
    """How the first SHEET_EPISODES roll-outs ended, with the final distance: (H, W, 3) uint8 RGB."""
    tiles = []
    for world, outcome in zip(worlds[:SHEET_EPISODES], outcomes, strict=False):
        image = Renderer(world.scene, *SHEET_TILE).render(world.path_rad[-1])
        image = framed(image, DONE_RGB if outcome.success else FAILED_RGB)
        text = f"{world.episode}: {outcome.final_m * 100:.1f} cm"
        cv2.putText(image, text, (7, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (255, 255, 255), 1, cv2.LINE_AA)
        tiles.append(image)
    return grid(tiles, SHEET_COLUMNS)


def draw_top_view(path, runs):
    """The table from above: where blocks lay and where the tip ended, one panel per run.

    Args:
        path: of the PNG.
        runs: run -> (worlds, outcomes).
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.6 * rows), layout="constrained")
    for axes, (name, (worlds, outcomes)) in zip(figure.subplots(rows, columns, squeeze=False).flat, runs.items(),
                                                strict=False):  # fmt: skip
        for world, outcome in zip(worlds, outcomes, strict=True):
            colour = np.array(DONE_RGB if outcome.success else FAILED_RGB) / 255
            block = block_corners(world.scene)[[0, 1, 2, 3, 0]]
            tip = tool_tip(world.path_rad[-1])
            x, y = world.scene.block_xy_m
            axes.fill(block[:, 1], block[:, 0], facecolor=colour, alpha=0.18, edgecolor=colour, linewidth=0.8)
            axes.plot([y, tip[1]], [x, tip[0]], color=colour, linewidth=0.8)
            axes.plot(tip[1], tip[0], "o" if outcome.success else "x", color=colour, markersize=4)
        successes = sum(outcome.success for outcome in outcomes)
        axes.set_title(f"{name}: {successes} of {len(outcomes)}")
        axes.set(xlabel="y, m", ylabel="x, m", aspect="equal")
        axes.grid(alpha=0.25)
    for axes in list(figure.axes)[len(runs) :]:
        axes.remove()
    marks = [
        Line2D([], [], color=np.array(DONE_RGB) / 255, marker="o", label="block touched; the tip's end"),
        Line2D([], [], color=np.array(FAILED_RGB) / 255, marker="x", label="not touched; the tip's end"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=100, format="png")
