'use strict';
// Brings the database up to LiteLLM's schema, as the official image does at its start (there with Prisma's migrate,
// which is a download). Keeps Prisma's own list of what has been applied; run again, it applies only what is new.
const fs = require('fs');
const path = require('path');
const { Client } = require('pg');

const FOLDER = '/app/migrations';
const LOCK = 72707369; // the number that prisma migrate locks: two replicas that start at once take turns
const TABLE = `CREATE TABLE IF NOT EXISTS _prisma_migrations (id varchar(36) PRIMARY KEY, checksum varchar(64) NOT NULL,
  finished_at timestamptz, migration_name varchar(255) NOT NULL, logs text, rolled_back_at timestamptz,
  started_at timestamptz NOT NULL DEFAULT now(), applied_steps_count integer NOT NULL DEFAULT 0)`;

async function connect(url, seconds) {
  for (const end = Date.now() + seconds * 1000; ; ) {
    const client = new Client({ connectionString: url, connectionTimeoutMillis: 5000 });
    try {
      await client.connect();
      return client;
    } catch (error) {
      if (Date.now() > end) throw error;
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }
}

async function main() {
  const url = new URL(process.env.DATABASE_URL);
  url.search = ''; // Prisma's own parameters (connection_limit, ...) mean nothing to this driver
  const client = await connect(url.toString(), 60);
  await client.query('SELECT pg_advisory_lock($1)', [LOCK]);
  await client.query(TABLE);
  const { rows } = await client.query('SELECT migration_name FROM _prisma_migrations WHERE finished_at IS NOT NULL');
  const applied = new Set(rows.map((row) => row.migration_name));
  const names = fs.readdirSync(FOLDER).filter((name) => fs.existsSync(path.join(FOLDER, name, 'migration.sql')));
  const fresh = names.sort().filter((name) => !applied.has(name));
  for (const name of fresh) {
    const sql = fs.readFileSync(path.join(FOLDER, name, 'migration.sql'), 'utf8');
    // one message is one transaction, all or nothing; an index that is built concurrently cannot be part of one
    await client.query(sql.replace(/\bCONCURRENTLY\b/g, ''));
    await client.query(
      `INSERT INTO _prisma_migrations (id, checksum, migration_name, finished_at, applied_steps_count)
       VALUES (gen_random_uuid()::text, '', $1, now(), 1)`, [name]);
  }
  console.log(`database schema: ${fresh.length} migrations applied, ${applied.size} were there`);
  await client.end();
}

main().catch((error) => {
  console.error(`database schema: ${error.message}`);
  process.exit(1);
});
