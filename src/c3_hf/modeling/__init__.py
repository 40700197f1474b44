"""The model: these modules are the package's classes and, byte for byte, the remote-code files of a Hub repository."""

# First, because the import of transformers registers C3 and imports the files of this folder for it.
import transformers  # noqa: F401
