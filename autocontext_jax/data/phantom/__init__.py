"""Generated labelled CT scans of an upper abdomen: the embedded default data."""
