"""The scene and its camera: a UR10e on a table with a coloured block, drawn with NumPy and OpenCV.

Everything is a solid cylinder or a box, projected through a calibrated pinhole camera and painted from the
far to the near. A cylinder is shaded by painting ever thinner cylinders inside it, each brighter and closer
to the light, which needs no pixel loop and draws a frame in a few milliseconds.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from ur10e import TOOL_LENGTH_M, link_frames

# The fixed camera, as calibrated at 640x480 (pixel centres at integers); no lens distortion.
CALIBRATED_HEIGHT, CALIBRATED_WIDTH = 480, 640
FOCAL_PX, CENTRE_X_PX, CENTRE_Y_PX = 615.0, 321.3, 238.7
CAMERA_POSITION_M, CAMERA_TARGET_M = np.array([-1.70, 0.86, 1.08]), np.array([-0.40, 0.00, 0.36])

# The table's top is the plane z = 0 of the robot's base. The block lies where the arm reaches and the camera sees.
TABLE_LOW_M, TABLE_HIGH_M, TABLE_THICKNESS_M = (-1.05, -0.75), (0.35, 0.75), 0.06
BLOCK_SIDE_M = 0.08
BLOCK_LOW_M, BLOCK_HIGH_M = (-0.82, -0.28), (-0.50, 0.28)

VARIED_CAMERA_M = 0.03  # how far `varied` moves the camera at most

LIGHT_GREY, DARK_GREY, BLACK, BLUE = (214, 217, 220), (120, 124, 130), (52, 54, 58), (86, 160, 211)
# Painted layers of a cylinder: its radius (as a fraction) and its brightness, from the rim to the highlight.
LAYER_RADIUS = np.cos(np.linspace(0.0, 0.47 * np.pi, 10))
LAYER_BRIGHTNESS = np.linspace(0.5, 1.08, 10)
CIRCLE_POINTS = 24
SUBPIXEL_BITS = 4  # OpenCV's fixed-point coordinates: a sixteenth of a pixel


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. K (3, 3) in pixels; R (3, 3), t (3,) m: world to camera (x right, y down, z ahead)."""

    height: int
    width: int
    K: np.ndarray
    R: np.ndarray
    t: np.ndarray

    @property
    def position_m(self):
        """Where the camera stands: (3,) m."""
        return -self.R.T @ self.t

    def project(self, points_m):
        """World points (..., 3) m, in front of the camera, to pixels (..., 2) float64 (x, y)."""
        in_camera = points_m @ self.R.T + self.t
        return in_camera[..., :2] / in_camera[..., 2:] * self.K[[0, 1], [0, 1]] + self.K[:2, 2]


def camera(height=CALIBRATED_HEIGHT, width=CALIBRATED_WIDTH, shift_m=(0.0, 0.0, 0.0)):
    """The fixed camera with its calibration scaled to `height` x `width` pixels, as resizing its image would.

    `shift_m` (3,) m moves it from its place without turning it.
    """
    scale_x, scale_y = width / CALIBRATED_WIDTH, height / CALIBRATED_HEIGHT
    K = np.array(
        [
            [FOCAL_PX * scale_x, 0.0, (CENTRE_X_PX + 0.5) * scale_x - 0.5],
            [0.0, FOCAL_PX * scale_y, (CENTRE_Y_PX + 0.5) * scale_y - 0.5],
            [0.0, 0.0, 1.0],
        ]
    )
    ahead = _unit(CAMERA_TARGET_M - CAMERA_POSITION_M)
    right = _unit(np.cross(ahead, [0.0, 0.0, 1.0]))
    R = np.stack([right, np.cross(ahead, right), ahead])
    return Camera(height, width, K, R, -R @ (CAMERA_POSITION_M + shift_m))


@dataclass(frozen=True)
class Scene:
    """What differs between episodes: the block, the light, the camera's place. Colours are RGB, 0 to 255."""

    block_xy_m: tuple
    block_yaw_rad: float
    block_rgb: tuple
    light: tuple  # unit vector towards the light
    brightness: float
    camera_shift_m: tuple = (0.0, 0.0, 0.0)  # from where it was calibrated


def random_scene(rng):
    """A Scene from a NumPy Generator: a red to orange block (no other thing is) anywhere in the work area."""
    block_xy_m = tuple(rng.uniform(BLOCK_LOW_M, BLOCK_HIGH_M).tolist())
    yaw_rad = float(rng.uniform(-np.pi / 4, np.pi / 4))
    red, green, blue = rng.uniform((215, 25, 25), (240, 95, 45)).tolist()
    light = tuple(_unit(rng.uniform((-0.7, -0.2, 1.5), (-0.3, 0.4, 1.5))).tolist())
    return Scene(block_xy_m, yaw_rad, (red, green, blue), light, float(rng.uniform(0.9, 1.08)))


def varied(scene, rng):
    """The scene as a cell that is not always the same shows it: a Scene with other light and another camera pose.

    The light comes from any side, as high as it was; the camera is up to VARIED_CAMERA_M from its place.
    """
    turn_rad = rng.uniform(-np.pi, np.pi)
    x, y, z = scene.light
    cos, sin = np.cos(turn_rad), np.sin(turn_rad)
    direction = _unit(rng.normal(size=3))
    shift_m = rng.uniform(0.0, VARIED_CAMERA_M) * direction
    return replace(scene, light=(x * cos - y * sin, x * sin + y * cos, z), camera_shift_m=tuple(shift_m.tolist()))


class Renderer:
    """Draws one `scene` as seen by `camera`; what does not move is drawn once, here.

    OpenCV's anti-aliased polygons are up to a pixel too large all round, which matters in a small image: those
    are drawn a whole number of times larger and averaged down.
    """

    def __init__(self, scene, height=CALIBRATED_HEIGHT, width=CALIBRATED_WIDTH):
        self.scene = scene
        self.camera = camera(height, width, scene.camera_shift_m)
        oversampling = -(-CALIBRATED_HEIGHT // height)
        self._canvas = camera(height * oversampling, width * oversampling, scene.camera_shift_m)
        self._camera_m = self.camera.position_m
        self._light = np.array(scene.light)
        self._block_corners = block_corners(scene)
        self._background, self._table_mask = self._draw_background()

    def render(self, q_rad):
        """The camera's image at joint angles `q_rad` (6,) rad: (H, W, 3) uint8 RGB."""
        start, end, radius, colours, lids = _arm_cylinders(link_frames(q_rad))
        circles = _cylinder_circles(start, end, radius, self._light, self._camera_m)  # (N, layers, 2 ends, points, 3)

        image = self._shade_table([circles[:, 0].reshape(len(circles), -1, 3), self._block_corners[None]])

        pixels = self._canvas.project(circles)
        middles = np.vstack([(start + end) / 2, self._block_corners.mean(axis=0)])
        distance = np.linalg.norm(middles - self._camera_m, axis=1)
        for i in np.argsort(-distance):
            if i == len(start):
                self._draw_block(image)
            else:
                self._draw_cylinder(image, pixels[i], start[i], end[i], colours[i], lids[i])
        if self._canvas.height == self.camera.height:
            return image
        return cv2.resize(image, (self.camera.width, self.camera.height), interpolation=cv2.INTER_AREA)

    def _draw_cylinder(self, image, pixels, start, end, rgb, lid):
        layers = pixels.reshape(len(pixels), -1, 2).astype(np.float32)
        for layer, brightness in zip(layers, LAYER_BRIGHTNESS, strict=True):
            self._fill(image, cv2.convexHull(layer), rgb, brightness)
        axis = _unit(end - start)
        for circle, centre, normal in ((pixels[0, 0], start, -axis), (pixels[0, 1], end, axis)):
            if lid is not None and normal @ (self._camera_m - centre) > 0:
                self._fill(image, circle, lid, 0.62 + 0.4 * max(normal @ self._light, 0.0))

    def _draw_block(self, image):
        c = self._block_corners  # bottom 0..3, top 4..7, both counter-clockwise
        middle = c.mean(axis=0)
        for face in ((0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7), (4, 5, 6, 7)):
            centre = c[list(face)].mean(axis=0)
            normal = _unit(centre - middle)
            if normal @ (self._camera_m - centre) > 0:
                shade = 0.62 + 0.45 * max(normal @ self._light, 0.0)
                self._fill(image, self._canvas.project(c[list(face)]), self.scene.block_rgb, shade)

    def _draw_background(self):
        height, width = self._canvas.height, self._canvas.width
        # A room: a dim wall that fades into the floor.
        fade = np.linspace(0.0, 1.0, height)[:, None, None]
        room = (1 - fade) * np.array([118.0, 130.0, 142.0]) + fade * np.array([72.0, 78.0, 86.0])
        image = np.clip(room * self.scene.brightness * np.ones((1, width, 1)), 0, 255).astype(np.uint8)

        (x0, y0), (x1, y1) = TABLE_LOW_M, TABLE_HIGH_M
        top = np.array([(x0, y0, 0.0), (x0, y1, 0.0), (x1, y1, 0.0), (x1, y0, 0.0)])
        for a, b, shade in ((0, 1, 0.62), (1, 2, 0.5)):  # the two edges that face the camera
            edge = np.array([top[a], top[b], top[b], top[a]])
            edge[2:, 2] -= TABLE_THICKNESS_M
            self._fill(image, self._canvas.project(edge), (176, 160, 138), shade)
        self._fill(image, self._canvas.project(top), (186, 172, 150), 1.0)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillConvexPoly(mask, _fixed(self._canvas.project(top)), 255, cv2.LINE_AA, SUBPIXEL_BITS)
        return image, mask

    def _shade_table(self, solids):
        """The background with the soft shadow that convex `solids` (each (N, points, 3) m) cast on the table."""
        height, width = self._canvas.height, self._canvas.width
        shadow = np.zeros((height, width), np.uint8)
        for points in solids:
            on_table = points - points[..., 2:] / self._light[2] * self._light
            for pixels in self._canvas.project(on_table).astype(np.float32):
                cv2.fillConvexPoly(shadow, _fixed(cv2.convexHull(pixels)), 110, cv2.LINE_AA, SUBPIXEL_BITS)
        softness = max(3, width // 50) | 1
        shadow = cv2.bitwise_and(cv2.blur(shadow, (softness, softness)), self._table_mask)
        image = self._background.copy()
        x, y, w, h = cv2.boundingRect(shadow)  # elsewhere nothing darkens it
        part = image[y : y + h, x : x + w]
        image[y : y + h, x : x + w] = cv2.multiply(
            part, cv2.cvtColor(255 - shadow[y : y + h, x : x + w], cv2.COLOR_GRAY2RGB), scale=1 / 255
        )
        return image

    def _fill(self, image, pixels, rgb, shade):
        colour = [min(255.0, v * shade * self.scene.brightness) for v in rgb]
        cv2.fillConvexPoly(image, _fixed(pixels), colour, cv2.LINE_AA, SUBPIXEL_BITS)


def block_corners(scene):
    """The block's corners on the table: (8, 3) m, the four of the bottom and then the four of the top."""
    half = BLOCK_SIDE_M / 2
    angle = scene.block_yaw_rad + np.pi / 4 + np.arange(4) * np.pi / 2
    ring = np.array(scene.block_xy_m) + half * np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    bottom = np.column_stack([ring, np.zeros(4)])
    return np.vstack([bottom, bottom + [0.0, 0.0, BLOCK_SIDE_M]])


def _arm_cylinders(frames):
    """The arm's solids from its DH frames (7, 4, 4): start (N, 3), end (N, 3), radius (N,), colours, lids.

    The DH frames put upper arm and forearm in one plane; on the robot they lie side by side along the
    shoulder's axis, about 0.176 m and 0.040 m from that plane, as drawn here.
    """
    origin, z_axis = frames[:, :3, 3], frames[:, :3, 2]
    side = z_axis[1]  # axis of shoulder lift, elbow and wrist 1
    up = np.array([0.0, 0.0, 1.0])
    shoulder, elbow, wrist = origin[1], origin[2], origin[3]
    tip = origin[6] + TOOL_LENGTH_M * z_axis[6]
    far, near = 0.176 * side, 0.040 * side
    solids = (  # start, end, radius, colour, colour of the flat ends or None where they are hidden
        (origin[0], origin[0] + 0.035 * up, 0.105, DARK_GREY, DARK_GREY),
        (origin[0] + 0.03 * up, shoulder + 0.02 * up, 0.082, LIGHT_GREY, None),
        (shoulder - 0.085 * side, shoulder + 0.10 * side, 0.085, LIGHT_GREY, BLUE),
        (shoulder + 0.10 * side, shoulder + far + 0.075 * side, 0.080, LIGHT_GREY, BLUE),
        (shoulder + far, elbow + far, 0.060, LIGHT_GREY, None),
        (elbow + far + 0.07 * side, elbow + far - 0.065 * side, 0.070, LIGHT_GREY, BLUE),
        (elbow + far - 0.065 * side, elbow + near - 0.06 * side, 0.064, LIGHT_GREY, BLUE),
        (elbow + near, wrist + near, 0.050, LIGHT_GREY, None),
        (wrist + near - 0.055 * side, origin[4] + 0.052 * side, 0.050, LIGHT_GREY, BLUE),
        (origin[4] - 0.052 * z_axis[4], origin[5] + 0.052 * z_axis[4], 0.048, LIGHT_GREY, BLUE),
        (origin[5], origin[6] - 0.025 * z_axis[6], 0.047, LIGHT_GREY, None),
        (origin[6] - 0.025 * z_axis[6], origin[6] + 0.012 * z_axis[6], 0.042, DARK_GREY, DARK_GREY),
        (origin[6] + 0.012 * z_axis[6], tip, 0.014, BLACK, BLACK),
    )
    start, end, radius, colours, lids = zip(*solids, strict=True)
    return np.array(start), np.array(end), np.array(radius), colours, lids


def _cylinder_circles(start, end, radius, light, camera_m):
    """End circles of every painted layer of N cylinders: (N, layers, 2 ends, points, 3) m.

    Layer 0 is the cylinder itself; the others lie inside it, shifted towards the light and the camera.
    """
    axis = _unit(end - start)
    to_camera = _unit(camera_m - (start + end) / 2)
    bright = to_camera + 0.9 * light
    bright = _unit(bright - np.sum(bright * axis, axis=1, keepdims=True) * axis)
    across = np.cross(axis, bright)
    angle = np.arange(CIRCLE_POINTS) * (2 * np.pi / CIRCLE_POINTS)
    # (N, points, 3), and from there (N, layers, points, 3)
    circle = np.cos(angle)[:, None] * bright[:, None] + np.sin(angle)[:, None] * across[:, None]
    size = LAYER_RADIUS[:, None, None]
    scaled = (size * circle[:, None] + (1 - size) * bright[:, None, None]) * radius[:, None, None, None]
    return scaled[:, :, None] + np.stack([start, end], axis=1)[:, None, :, None]


def _unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _fixed(pixels):
    return np.rint(pixels * (1 << SUBPIXEL_BITS)).astype(np.int32)
