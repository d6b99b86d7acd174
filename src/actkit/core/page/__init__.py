"""Pages in a browser: one file each, with pictures as inline SVG, that needs no network."""
