"""`python -m proxy` is `agentflow-proxy`."""

from proxy.cli import main

raise SystemExit(main())
