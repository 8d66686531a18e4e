"""hlrp: robot policies from video without action labels. Import from the module that defines a name."""
