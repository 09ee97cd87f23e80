"""One module a family of operators; importing this package fills the table."""

import qcompile.spaces.rules.attention
import qcompile.spaces.rules.indexing
import qcompile.spaces.rules.joining
import qcompile.spaces.rules.norms
import qcompile.spaces.rules.online
import qcompile.spaces.rules.pointwise
import qcompile.spaces.rules.products
import qcompile.spaces.rules.reductions
import qcompile.spaces.rules.views  # noqa: F401
