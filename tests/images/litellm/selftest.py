"""Does the database engine of this image (query-engine.js) do what Prisma's own does? All of what LiteLLM uses.

Run it when a pin changes, in a network with an empty PostgreSQL:

    docker run --rm --network NET -e DATABASE_URL=... --entrypoint sh llm-manager-test/litellm:latest \
      -c 'NODE_PATH=/opt/prisma-engine/node_modules node /app/first-start.js && python3 /app/selftest.py'
"""

import asyncio
import contextlib
import datetime as dt

from prisma import Json, Prisma, errors

BIG = 2**53 + 1  # the first integer that a JavaScript number cannot hold
PLAIN = {
    "3::int": 3,
    "9007199254740993::bigint": BIG,
    "1.5::float8": 1.5,
    "true": True,
    "null::int": None,
    "'x'::text": "x",
    "array['a', null]::text[]": ["a", None],
    "array_agg(1)": [1],
    "array_agg('pg_class'::name)": ["pg_class"],
    "'{\"x\": 1}'::jsonb": {"x": 1},
}


async def every_model(db):
    names = [name for name in dir(db) if hasattr(getattr(db, name), "find_first")]
    assert len(names) > 50
    for name in names:
        await getattr(db, name).find_first()
        assert await getattr(db, name).count() >= 0


async def writes(users):
    data = {"a": 'é😀"\n', "b": [1, 2.5, None]}
    one = {"user_id": "u1", "metadata": Json(data), "models": ["a", "b"], "tpm_limit": BIG}
    user = await users.create(data=one)
    assert (user.metadata, user.models, user.tpm_limit) == (data, ["a", "b"], BIG)
    try:
        await users.create(data={"user_id": "u1"})
        raise SystemExit("a second row with the same key was taken")
    except errors.UniqueViolationError:
        pass
    change = {"create": {"user_id": "u2", "spend": 1.25}, "update": {"spend": {"increment": 2}}}
    assert [(await users.upsert(where={"user_id": "u2"}, data=change)).spend for _ in "ab"] == [
        1.25,
        3.25,
    ]
    assert await users.update(where={"user_id": "nobody"}, data={"spend": 1}) is None
    assert await users.count(where={"spend": {"gt": 3}}) == 1
    groups = await users.group_by(["user_role"], sum={"spend": True}, count=True)
    assert [group["_sum"]["spend"] for group in groups] == [3.25]


async def transactions(db):
    async def spend():
        return (await db.litellm_usertable.find_unique(where={"user_id": "u2"})).spend

    async with db.tx() as tx:
        await tx.litellm_usertable.update(where={"user_id": "u2"}, data={"spend": 100})
    assert await spend() == 100
    with contextlib.suppress(KeyError):
        async with db.tx() as tx:
            await tx.litellm_usertable.update(where={"user_id": "u2"}, data={"spend": 200})
            raise KeyError
    assert await spend() == 100
    async with db.batch_() as batch:
        for _ in range(2):
            batch.litellm_usertable.update(
                where={"user_id": "u2"}, data={"spend": {"increment": 3}}
            )
    assert await spend() == 106


async def relations(db):
    now = dt.datetime.now(dt.UTC)
    await db.litellm_verificationtoken.create(
        data={"token": "h1", "user_id": "u1", "expires": now, "aliases": Json({})}
    )
    later = {"expires": {"lte": now + dt.timedelta(seconds=1)}}
    found = await db.litellm_verificationtoken.find_many(
        where=later, include={"litellm_budget_table": True}
    )
    assert [row.token for row in found] == ["h1"]


async def raw(db):
    for sql, value in PLAIN.items():
        rows = await db.query_raw(f"select {sql} as x")
        assert rows == [{"x": value}], (sql, rows)
    await db.query_raw("select now() t, date '2024-01-01' d, gen_random_uuid() u, 1.10::numeric n")
    rows = await db.query_raw("select $1::int as a, $2::text as b, $3::text[] as c", 3, "x", ["y"])
    assert rows == [{"a": 3, "b": "x", "c": ["y"]}]
    where = 'update "LiteLLM_UserTable" set spend = spend + $1 where user_id = $2'
    assert await db.execute_raw(where, 1.0, "u2") == 1
    try:
        await db.query_raw("select * from nothing_here")
        raise SystemExit("a query of a missing table was answered")
    except errors.PrismaError:
        pass


async def main():
    db = Prisma()
    await db.connect()
    await every_model(db)
    await writes(db.litellm_usertable)
    await transactions(db)
    await relations(db)
    await raw(db)
    await db.disconnect()
    print("the database engine does all that is asked of it")


asyncio.run(main())
