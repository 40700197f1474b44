"""The model: these modules are the package's classes and, byte for byte, the remote-code files of a Hub repository."""
