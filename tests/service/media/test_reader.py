from service.media.reader import ImageReader
from service.media.store import Image
from tests.support.clips import animation, scene
from tests.support.pictures import LIMITS, encoded, picture


async def test_the_reader_decodes_and_names_images_off_the_loop():
    reader = ImageReader(LIMITS, threads=1)
    small, large = encoded(picture()), bytes(1_500_000)
    try:
        assert (await (await reader.begin_decode(small))).pixels.shape == (3, 224, 224)
        assert await reader.identify(small) == Image.of(small)
        assert (await reader.identify(large)).digest == Image.of(large).digest
    finally:
        reader.close()


async def test_the_reader_decodes_clips_off_the_loop():
    reader = ImageReader(LIMITS, threads=1)
    try:
        clip = await reader.decode_clip(animation("GIF", [scene(index, 5) for index in range(5)]), 3)
        assert [frame.index for frame in clip.frames] == [0, 2, 4]
    finally:
        reader.close()
