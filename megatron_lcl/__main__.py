from megatron_lcl.cli import main

raise SystemExit(main())
