"""An inference that is killed and goes on, whatever the framework."""

import pytest

from dk_detection.evaluation import shards


def check_goes_on(run, folder, number: int, whole: list[dict]) -> None:
    """Stops `run()`, which keeps the results of `number` images in `folder`, at the third; then it has to give `whole`.

    The second run must not look at an image again that was finished.
    """
    write_result, seen = shards.Writer.write, []

    def stop_at_the_third(writer, image_id, found):
        seen.append(image_id)
        if len(seen) == 3:
            writer._file.write(b'{"image_id":')  # killed in the middle of a line
            raise KeyboardInterrupt
        write_result(writer, image_id, found)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards.Writer, "write", stop_at_the_third)
        run()
    assert len(shards.finished(str(folder))) == 2
    seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Writer, "write", lambda *a: (seen.append(a[1]), write_result(*a)))
        assert run() == whole
    assert len(seen) == number - 2
