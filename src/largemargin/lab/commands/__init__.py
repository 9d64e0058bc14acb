"""The commands of ``largemargin``: a module each, with ``HELP``, ``parser()`` and ``run()``; none imports torch before it runs."""
