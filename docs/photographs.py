"""Photographs: which way up is a crop, and can it be denoised?

python docs/photographs.py make FOLDER [--size 128] cuts crops from the photographs of some packages of Debian 12.
FOLDER/{train,val}/DEGREES is the image folder of the orientation task, FOLDER/images the crops for scripts/denoise.py.
"""

import argparse
import random
from pathlib import Path

from PIL import Image

from timm_metricconv.recipes.data import read_image

ROOT = Path("/usr/share")
# of each package the photographs, not drawings, in which a person sees what is up
PHOTOGRAPHS = {
    "lomiri-wallpapers-16.04": [
        "backgrounds/Bridge_by_Sander_Klootwijk.jpg",
        "backgrounds/Wine_by_Jakkub_Mede.jpg",
        "backgrounds/aitzgorri_by_Aitzol_Berasategi.jpg",
        "backgrounds/free_by_Peter_Nerlich.jpg",
        "backgrounds/friends_by_Aitzol_Berasategi.jpg",
        "backgrounds/life_by_Aitzol_Berasategi.jpg",
        "backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "backgrounds/seeding_by_Clements_Engelhardt.jpg",
        "backgrounds/sunset_by_Aitzol_Berasategi.jpg",
    ],
    "plasma-workspace-wallpapers": [
        "wallpapers/BytheWater/contents/images/2560x1600.jpg",
        "wallpapers/ColdRipple/contents/images/2560x1600.jpg",
        "wallpapers/DarkestHour/contents/images/2560x1600.jpg",
        "wallpapers/EveningGlow/contents/images/2560x1600.jpg",
        "wallpapers/FallenLeaf/contents/images/2560x1600.jpg",
        "wallpapers/Path/contents/images/2560x1600.jpg",
        "wallpapers/summer_1am/contents/images/2560x1600.jpg",
    ],
    "mate-backgrounds": [
        "backgrounds/mate/nature/Dune.jpg",
        "backgrounds/mate/nature/GreenMeadow.jpg",
        "backgrounds/mate/nature/Storm.jpg",
    ],
    "lxqt-themes": [
        "lxqt/wallpapers/Butterfly-Kenneth-Wimer.jpg",
        "lxqt/wallpapers/Valendas.png",
        "lxqt/wallpapers/after-the-rain.jpg",
        "lxqt/wallpapers/appleflower.png",
        "lxqt/wallpapers/beam.png",
        "lxqt/wallpapers/flowers.png",
        "lxqt/wallpapers/fog.jpg",
        "lxqt/wallpapers/this-is-not-windows.jpg",
    ],
    "sddm-theme-maldives": ["sddm/themes/maldives/background.jpg"],
    "palapeli-data": [
        "palapeli/collection/castle-maintenon.jpg",
        "palapeli/collection/cincinnati-bridge.jpg",
        "palapeli/collection/european-honey-bee.jpg",
    ],
    "plasma-workspace-data": [
        "plasma/avatars/photos/Air Balloon.png",
        "plasma/avatars/photos/Astronaut.png",
        "plasma/avatars/photos/Books.png",
        "plasma/avatars/photos/Brushes.png",
        "plasma/avatars/photos/Car.png",
        "plasma/avatars/photos/Cocktail.png",
        "plasma/avatars/photos/Dog.png",
        "plasma/avatars/photos/Owl.png",
        "plasma/avatars/photos/Pancakes.png",
        "plasma/avatars/photos/Parrot.png",
        "plasma/avatars/photos/Soccer.png",
    ],
}


def photographs():
    """The files of each split: every third photograph is for validation, so that no photograph is in both."""
    files = [ROOT / name for names in PHOTOGRAPHS.values() for name in names]
    absent = [file for file in files if not file.is_file()]
    if absent:
        packages = " ".join(PHOTOGRAPHS)
        raise SystemExit(f"There is no {absent[0]}: apt-get install -y --no-install-recommends {packages}")
    return {
        "train": [file for number, file in enumerate(files) if number % 3 != 2],
        "val": [file for number, file in enumerate(files) if number % 3 == 2],
    }


def crop(photograph, size, rng):
    """A random square of half to all of the shorter side, at `size`×`size`."""
    side = rng.uniform(0.5, 1) * min(photograph.size)
    left, top = (rng.uniform(0, length - side) for length in photograph.size)
    return photograph.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def make(folder, size=128, each=16):
    """`folder`/{train,val}/DEGREES/PHOTOGRAPH_CROP.png: `each` crops of each photograph, turned anticlockwise.

    Those at 0° are also in `folder`/images/{train,test}, as JPEG files: the layout of BSDS300.
    """
    for split, files in photographs().items():
        for number, file in enumerate(files):
            photograph = read_image(file)
            for index in range(each):
                degrees = 90 * (index % 4)
                name = f"{split}{number:02d}_{index:02d}"
                upright = crop(photograph, size, random.Random(name))
                path = Path(folder, split, str(degrees), f"{name}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                upright.rotate(degrees).save(path)
                if degrees == 0:
                    path = Path(folder, "images", {"train": "train", "val": "test"}[split], f"{name}.jpg")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    upright.save(path, quality=95)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make"])
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, default=128, help="edge of the crops in pixels")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.size)
