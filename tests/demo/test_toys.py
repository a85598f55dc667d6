from random import Random

from PIL import Image, ImageChops

from vlmtune.demo.toy_kinds import COLOURS, KINDS
from vlmtune.demo.toys import HEIGHT, MAX_THINGS, WIDTH, draw_toys, overlap


def test_a_seed_always_gives_the_same_image() -> None:
    one, things = draw_toys(Random(5))
    other, same = draw_toys(Random(5))
    assert one.tobytes() == other.tobytes() and things == same
    assert one.size == (WIDTH, HEIGHT) and one.mode == "RGB"
    assert draw_toys(Random(6))[0].tobytes() != one.tobytes()


def test_images_hold_every_number_kind_and_colour_of_things_that_can_be_seen() -> None:
    drawn = [things for _, things in (draw_toys(Random(number)) for number in range(300))]
    everything = [thing for things in drawn for thing in things]
    assert {len(things) for things in drawn} == set(range(MAX_THINGS + 1))
    assert {thing.kind for thing in everything} == {*KINDS, None}
    assert {thing.colour for thing in everything} == set(COLOURS)
    assert all(
        -WIDTH / 4 < thing.middle[0] < WIDTH * 1.25 and 0 < thing.middle[1] < HEIGHT for thing in everything
    )
    hidden = [
        overlap(one.box, other.box)
        for things in drawn
        for at, one in enumerate(things)
        for other in things[:at]
    ]
    assert sum(share > 0.5 for share in hidden) < 0.01 * len(hidden)


def test_an_empty_image_differs_from_a_full_one_where_things_are() -> None:
    for number in range(40):
        image, things = draw_toys(Random(number))
        for thing in things:
            box = [max(0, round(edge)) for edge in thing.box]
            part = image.crop((box[0], box[1], min(WIDTH, box[2]), min(HEIGHT, box[3])))
            plain = Image.new("RGB", part.size, part.getpixel((part.width // 2, part.height // 2)))
            if thing.kind not in ("square", "circle", "cross") and part.width > 2:
                assert ImageChops.difference(part, plain).getbbox() is not None
