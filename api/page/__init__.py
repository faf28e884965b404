"""The page at `/`: HTML, scripts and styles, on the same API as everyone's programs."""
