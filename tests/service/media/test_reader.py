from service.media.reader import ImageReader
from service.media.store import Image
from tests.support.pictures import LIMITS, encoded, picture


async def test_the_reader_decodes_and_names_images_off_the_loop():
    reader = ImageReader(LIMITS, threads=1)
    small, large = encoded(picture()), bytes(1_500_000)
    try:
        assert (await reader.decode(small)).pixels.shape == (3, 224, 224)
        assert await reader.identify(small) == Image.of(small)
        assert (await reader.identify(large)).digest == Image.of(large).digest
    finally:
        reader.close()
