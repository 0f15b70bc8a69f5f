"""The page: people blend, draw, compare, learn and export concepts in a browser.

    python -m app [--subspace FILE] [--port N]

The engine knows the model and no page, the page knows the engine and no model; training runs in a process of its own.
"""
