// Drives socket.io-client for a test: commands come as JSON lines on stdin, everything that happens goes to stdout.
import { createInterface } from 'node:readline';
import { createRequire } from 'node:module';

const [modules, url, transport, key] = process.argv.slice(2);
const { io } = createRequire(modules)('socket.io-client');
const say = (event, data) => process.stdout.write(JSON.stringify({ event, data }) + '\n');

const socket = io(url, {
  transports: transport.split(','),
  auth: key ? { token: key } : undefined,
  reconnectionDelay: 100,
  reconnectionDelayMax: 500,
});
socket.on('connect', () => say('connect', { transport: socket.io.engine.transport.name }));
socket.on('disconnect', (reason) => say('disconnect', { reason }));
socket.on('connect_error', (error) => say('connect_error', { message: error.message }));
socket.onAny((event, ...data) => say(event, data[0]));

createInterface({ input: process.stdin }).on('line', (line) => {
  const { event, args } = JSON.parse(line);
  if (event === 'break') socket.io.engine.close();
  else socket.emit(event, ...args);
}).on('close', () => { socket.close(); process.exit(0); });
