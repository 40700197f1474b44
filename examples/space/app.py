"""The Space: a page on which a C3 model compresses, restores and forgets. The page itself is `c3_hf.web`."""

import os

from c3_hf import C3Pipeline
from c3_hf.web.app import launch


# A folder or a Hub id, in the Space's settings; without one the small model in the package.
pipe = C3Pipeline.from_pretrained(os.environ.get("C3_MODEL") or None, dtype="float32")
launch(pipe)
