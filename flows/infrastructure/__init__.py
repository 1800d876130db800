"""§4 of the manual: infrastructure."""
