"""Small annotated sets on disk: coloured rectangles on grey noise."""

import json

import numpy as np
from PIL import Image

COLOURS = ((230, 40, 40), (40, 200, 60), (50, 60, 230))
NAMES = ("red", "green", "blue")


def draw(seed, size=(32, 32)):
  """Picture uint8 [h, w, 3], mask uint8 [h, w] (0 is the ground), boxes, labels."""
  rng = np.random.default_rng(seed)
  h, w = size
  image = rng.integers(90, 130, (h, w, 3)).astype(np.uint8)
  mask, boxes, labels = np.zeros(size, np.uint8), [], []
  for half in (0, 1):  # one in the left half, one in the right, so that none hides another
    side_w, side_h = rng.integers(8, w // 2 - 1), rng.integers(8, h - 4)
    left = half * w // 2 + rng.integers(0, w // 2 - side_w)
    top, label = rng.integers(0, h - side_h), int(rng.integers(0, 3))
    image[top : top + side_h, left : left + side_w] = COLOURS[label]
    mask[top : top + side_h, left : left + side_w] = label + 1
    boxes.append([int(left), int(top), int(side_w), int(side_h)])
    labels.append(label)
  return image, mask, boxes, labels


def save(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)


def write_coco(root, *, split="train", n=6, change=None, size=(32, 32), first=0):
  """`change` gets the whole content of the annotation file before it is written."""
  images, annotations = [], []
  for i in range(n):
    image, _, boxes, labels = draw(first + i, size)
    save(root / "images" / split / f"{i}.png", image)
    images.append({"id": 10 + i, "file_name": f"{i}.png", "width": size[1], "height": size[0]})
    for box, label in zip(boxes, labels):
      annotations.append({
        "id": len(annotations) + 1, "image_id": 10 + i, "category_id": 5 * (label + 1),
        "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
      })  # fmt: skip
  categories = [{"id": 5 * (k + 1), "name": name} for k, name in enumerate(NAMES)]
  content = {"images": images, "annotations": annotations, "categories": categories}
  if change:
    change(content)
  file = root / "annotations" / f"{split}.json"
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content))
  return f"coco:{root}"


def write_masks(root, *, split="train", n=6, change=lambda i, mask: mask, size=(32, 32), first=0):
  for i in range(n):
    image, mask, _, _ = draw(first + i, size)
    save(root / "images" / split / f"{i}.png", image)
    save(root / "masks" / split / f"{i}.png", change(i, mask))
  (root / "classes.txt").write_text("\n".join(("ground", *NAMES)) + "\n")
  return f"masks:{root}"
