// Run Pokémon Showdown's server for this machine only, until stdin ends.
//
//   node server.cjs FOLDER PORT CHILDREN        FOLDER contains node_modules with pokemon-showdown
//
// CHILDREN is how many processes the server starts for each of its tasks; 0: it does all of them itself.
'use strict';
const fs = require('node:fs');
const path = require('node:path');

const root = path.join(path.resolve(process.argv[2]), 'node_modules', 'pokemon-showdown');
process.chdir(root);
for (const folder of ['config/chat-plugins', 'databases', 'logs/repl']) fs.mkdirSync(folder, {recursive: true});

// The server reads its settings from this file only. Its defaults listen on every address, give its authors a console,
// and ask play.pokemonshowdown.com who a user is.
const CONFIG = `exports.bindaddress = '127.0.0.1';
exports.subprocesses = Number(process.env.SHOWDOWN_CHILDREN);
exports.nothrottle = exports.noguestsecurity = exports.noipchecks = true;
exports.backdoor = exports.repl = exports.watchconfig = exports.crashguard = false;
exports.consoleips = [];
exports.loginserver = 'http://127.0.0.1:1/';
`;
const file = path.join(root, 'config', 'config.js');
if (!fs.existsSync(file) || fs.readFileSync(file, 'utf8') !== CONFIG) {
  const temporary = `${file}.${process.pid}`; // another server may read it now
  fs.writeFileSync(temporary, CONFIG);
  fs.renameSync(temporary, file);
}

process.env.SHOWDOWN_CHILDREN = process.argv[4]; // not in the file, which two servers may share
process.stdin.on('end', () => process.exit(0));
process.stdin.resume();
process.on('SIGINT', () => {}); // Ctrl-C reaches the parent, which closes stdin
require(path.join(root, 'dist', 'server', 'index.js')); // takes the port from the arguments: the first that is a number
