"""The page that shows what a C3 model keeps of a text: `c3-hf demo --web`, and the Space in examples/space."""
