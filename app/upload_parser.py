"""How the page reads an upload: files alone, and whole."""

from pathlib import Path
from typing import Any

from gradio.route_utils import GradioMultiPartParser, MultiPartException

from app.uploads import begun_files


class UploadParser(GradioMultiPartParser):
    """Gradio's, which keeps a part that is no file in memory, and a file on the disk whose upload does not end."""

    has_ended = False

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.file is None or part.field_name != "files":
            raise MultiPartException("an upload has files in parts of the name “files”, and no other parts")
        begun_files.get([]).append(Path(part.file.file.name))

    def on_end(self) -> None:
        self.has_ended = True

    async def parse(self) -> Any:
        form = await super().parse()
        if not self.has_ended:
            raise MultiPartException("the upload ends before its last part does")
        return form
