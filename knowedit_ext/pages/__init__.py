"""Results as pages to click: one self-contained HTML file each, that asks the network for nothing."""
