"""What builds the documentation site: `python -m tools.website.build`."""
